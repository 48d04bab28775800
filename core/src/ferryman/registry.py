"""From a scheme to a driver, and from a driver to its hooks.

Drivers are found through entry points (``ferryman.drivers`` by scheme, ``ferryman.transports`` by transport,
``ferryman.observers`` by any name).  Each connection gets one :class:`Hooks`: a pluggy manager that holds exactly one
driver and the observers.  pluggy neither awaits nor inspects coroutines, so this module does: one implementation is
awaited, its reply's type is checked, and whatever breaks the contract is raised with the name of the distribution.
"""

from __future__ import annotations

import inspect
import logging
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

from ferryman.errors import (
    DriverContractError,
    DriverLoadError,
    FerrymanError,
    NotSupportedError,
    UnknownSchemeError,
)
from ferryman.hookspecs import PROJECT, AccessRequest, DriverHooks, ObservedEvent, ObserverHooks, hook_names
from ferryman.types import Finding, FindingSeverity

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from ferryman.plan import Plan
    from ferryman.uri import ConnectionURI

_log = logging.getLogger(__name__)

DRIVERS = "ferryman.drivers"
TRANSPORTS = "ferryman.transports"
OBSERVERS = "ferryman.observers"
_REQUIRED = ("capabilities", "migrate_prepare", "migrate_perform", "migrate_finish")
_OF_HOSTS = frozenset(name for name in hook_names(DriverHooks) if not name.startswith("connection_"))

T = TypeVar("T")


class Hooks:
    """The hooks of one connection: one driver, any number of observers."""

    def __init__(self, driver: object, distribution: str) -> None:
        self.distribution = distribution
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(DriverHooks)
        self._manager.add_hookspecs(ObserverHooks)
        self._observers: dict[str, str] = {}
        self._only: frozenset[str] | None = None
        self._register(driver, distribution)
        for name in _REQUIRED:
            if not self.has(name):
                raise DriverContractError(
                    f"{distribution} has no hook {name}, which every driver needs",
                    distribution=distribution,
                    hook=name,
                )

    def _register(self, plugin: object, distribution: str) -> str:
        try:
            name = self._manager.register(plugin, name=f"{distribution}:{len(self._manager.get_plugins())}")
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise DriverContractError(
                f"{distribution} implements a hook that Ferryman does not have, or with other parameters: {error}",
                distribution=distribution,
                hook="",
            ) from error
        assert name is not None
        for caller in self._manager.get_hookcallers(plugin) or ():
            for found in caller.get_hookimpls():
                # pluggy also takes fewer parameters, and fills defaults in silence.
                if found.plugin is plugin and (found.argnames, found.kwargnames) != (("request",), ()):
                    raise DriverContractError(
                        f"the hook {caller.name} of {distribution} must have one parameter, request, and no default",
                        distribution=distribution,
                        hook=caller.name,
                    )
        return name

    def add_observer(self, observer: object, distribution: str) -> None:
        """Add an observer.

        :raises DriverContractError: it implements a hook of drivers, or none that exists.
        """
        name = self._register(observer, distribution)
        self._observers[name] = distribution
        for hook in hook_names(DriverHooks):
            if any(found.plugin is observer for found in getattr(self._manager.hook, hook).get_hookimpls()):
                raise DriverContractError(
                    f"the observer of {distribution} implements {hook}, which belongs to drivers",
                    distribution=distribution,
                    hook=hook,
                )

    def limit(self, only: frozenset[str]) -> None:
        """Have no other hooks of domains, hosts and migrations than these: the host behind the driver has no more."""
        self._only = only

    def has(self, hook: str) -> bool:
        """Whether the driver implements a hook."""
        if self._only is not None and hook in _OF_HOSTS and hook not in self._only:
            return False
        return bool(getattr(self._manager.hook, hook).get_hookimpls())

    async def call(self, hook: str, request: object, expects: type[T] | tuple[type, ...]) -> T:
        """Await the driver's implementation of a hook.

        :raises NotSupportedError: the driver has none.
        :raises DriverContractError: it is not a coroutine function, answered another type, or raised what is not
            Ferryman's.
        """
        if not self.has(hook):
            raise NotSupportedError(
                f"the driver {self.distribution} does not support {hook.replace('_', ' ')}"
            )
        reply = await self._await_one(hook, request)
        if not isinstance(reply, expects):
            wanted = (
                expects.__name__ if isinstance(expects, type) else " or ".join(t.__name__ for t in expects)
            )
            raise self._broken(hook, f"answered {type(reply).__name__} where {wanted} is due")
        return reply  # type: ignore[return-value]  # the tuple form answers object, as its callers know

    async def _await_one(self, hook: str, request: object) -> object:
        try:
            found = getattr(self._manager.hook, hook)(request=request)
            # pluggy leaves a None out: it comes from a function that is not async.
            if not found or not inspect.isawaitable(found[0]):
                raise self._broken(hook, "is not an async function")
            return await found[0]
        except FerrymanError:
            raise
        except Exception as error:  # the boundary to code that is not ours
            raise self._broken(
                hook, f"raised {type(error).__name__}, which is not an error of Ferryman"
            ) from error

    def _broken(self, hook: str, what: str) -> DriverContractError:
        return DriverContractError(
            f"the hook {hook} of {self.distribution} {what}: report it to that distribution",
            distribution=self.distribution,
            hook=hook,
        )

    async def review(self, plan: Plan) -> list[Finding]:
        """Ask every observer for findings; one that fails blocks."""
        findings: list[Finding] = []
        for distribution, review in self._each_observer("migration_review"):
            try:
                reply = await review(plan)
                if not isinstance(reply, list) or not all(isinstance(found, Finding) for found in reply):
                    raise TypeError("it answered something else than a list of findings")
            except Exception as error:  # noqa: BLE001 - the boundary to code that is not ours
                _log.exception("observer failed to review a plan", extra={"distribution": distribution})
                reply = [
                    Finding(
                        code="observer-failed",
                        severity=FindingSeverity.BLOCKER,
                        side=None,
                        message=f"the observer {distribution} failed on the plan: {type(error).__name__}: {error}",
                        remedy="mend or uninstall the observer",
                    )
                ]
            findings.extend(reply)
        return findings

    async def observe(self, event: ObservedEvent) -> None:
        """Show an event to every observer; what they raise is logged and nothing else."""
        for distribution, see in self._each_observer("migration_event"):
            try:
                await see(event)
            except Exception:  # noqa: BLE001 - the boundary to code that is not ours
                # Somebody else's code may raise anything, and a guest that is half-way between two hosts must not stop
                # for it. It is logged with its traceback; a cancellation is no Exception, and passes.
                _log.exception("observer failed on an event", extra={"distribution": distribution})

    async def review_access(self, request: AccessRequest) -> str | None:
        """Why a client may not do what it asks, by the first observer that refuses; one that fails refuses."""
        for distribution, review in self._each_observer("access_review"):
            try:
                reason = await review(request)
                if not (reason is None or isinstance(reason, str)):
                    raise TypeError("it answered something else than a reason, or None")
            except Exception:  # noqa: BLE001 - the boundary to code that is not ours
                # Somebody else's code may raise anything. What it would have said is not known, so the client may not
                # do it; the call is answered with that, and a session with other calls under way goes on.
                _log.exception("observer failed to review access", extra={"distribution": distribution})
                return f"the observer {distribution} failed on the request"
            if reason is not None:
                return reason
        return None

    @property
    def reviews_access(self) -> bool:
        """Whether anybody reviews what clients of a daemon do."""
        return bool(self._each_observer("access_review"))

    @property
    def observed(self) -> bool:
        """Whether anybody observes."""
        return bool(self._observers)

    def _each_observer(self, hook: str) -> list[tuple[str, Callable[[object], Awaitable[Any]]]]:
        # Called by whoever catches what they raise: one that is not async raises before there is anything to await.
        if not self._observers:
            return []
        caller = getattr(self._manager.hook, hook)
        return [
            (self._observers[found.plugin_name], found.function)
            for found in caller.get_hookimpls()
            if found.plugin_name in self._observers
        ]


def open_driver(uri: ConnectionURI) -> Hooks:
    """Make the hooks for a connection URI: its driver and every installed observer.

    :raises UnknownSchemeError: nothing installed serves the scheme or the transport.
    :raises DriverLoadError: what serves it cannot be imported or constructed.
    :raises DriverContractError: it does not follow :mod:`ferryman.hookspecs`.
    """
    namespace, name = (DRIVERS, uri.scheme) if uri.transport is None else (TRANSPORTS, uri.transport)
    driver, distribution = _load_one(namespace, name, uri)
    hooks = Hooks(driver, distribution)
    for observer_name in _installed(OBSERVERS):
        hooks.add_observer(*_load(OBSERVERS, observer_name))
    return hooks


def _installed(namespace: str) -> dict[str, list[str]]:
    """Names in a namespace, each with the distributions that provide it."""
    names: dict[str, list[str]] = {}
    for entry in metadata.entry_points(group=namespace):
        names.setdefault(entry.name, []).append(
            entry.dist.name if entry.dist is not None else "an unnamed distribution"
        )
    return names


def _load_one(namespace: str, name: str, uri: ConnectionURI) -> tuple[object, str]:
    installed = _installed(namespace)
    if name not in installed:
        kind = "driver for scheme" if namespace == DRIVERS else "transport"
        known = ", ".join(sorted(installed)) or "none"
        raise UnknownSchemeError(
            f"no {kind} {name!r} is installed for {uri} (installed: {known}): install its distribution, by"
            f" convention ferryman-{name if namespace == DRIVERS else 'remote'}",
            scheme=name,
            installed=sorted(installed),
        )
    return _load(namespace, name)


def _load(namespace: str, name: str) -> tuple[object, str]:
    from stevedore import NamedExtensionManager

    providers = sorted(set(_installed(namespace)[name]))
    if len(providers) > 1:
        raise DriverLoadError(
            f"{' and '.join(providers)} both provide {name!r} in {namespace}: uninstall one",
            distribution=providers[0],
        )
    distribution = providers[0]
    failures: list[BaseException] = []
    manager: Any = None
    # The managers' own calling helpers swallow exceptions: only the loaded class is taken from them.
    try:
        manager = NamedExtensionManager(
            namespace,
            [name],
            invoke_on_load=False,
            on_load_failure_callback=lambda _manager, _entry, error: failures.append(error),
        )
    except AssertionError as error:  # stevedore gives every other exception to the callback
        failures.append(error)
    if failures or not manager.extensions:
        cause = failures[0] if failures else None
        raise DriverLoadError(
            f"the entry point {name!r} of {distribution} in {namespace} cannot be loaded"
            f"{f': {type(cause).__name__}: {cause}' if cause else ''}",
            distribution=distribution,
        ) from cause
    try:
        return manager.extensions[0].plugin(), distribution
    except FerrymanError:
        raise
    except Exception as error:  # the boundary to code that is not ours
        raise DriverLoadError(
            f"the entry point {name!r} of {distribution} cannot be constructed: {type(error).__name__}: {error}",
            distribution=distribution,
        ) from error
