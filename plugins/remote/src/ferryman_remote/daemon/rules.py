"""Who may do what, by a file of rules: an observer that reviews what clients ask for.

docs/use/ferrymand.md explains the file.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ferryman.hookspecs import AccessRequest, hookimpl


class RulesError(ValueError):
    """The rules cannot be used."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Patterns, each of which must fit; of a list any one.

    :param allow: what it says of a request that it fits.
    :param who: of a client's identity, such as ``uid:1000`` or ``certificate:*.example.org``.
    :param actions: such as ``domain_*``.
    :param domains: of a domain's name; a request that concerns no domain fits ``*`` alone.
    :param hosts: of a host's connection URI.
    """

    allow: bool
    who: tuple[str, ...] = ("*",)
    actions: tuple[str, ...] = ("*",)
    domains: tuple[str, ...] = ("*",)
    hosts: tuple[str, ...] = ("*",)

    def fits(self, request: AccessRequest) -> bool:
        """Whether it says anything of a request."""
        return (
            _any(request.client.identity, self.who)
            and _any(request.action, self.actions)
            and ("*" in self.domains if request.name is None else _any(request.name, self.domains))
            and _any(request.host, self.hosts)
        )


def _any(value: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(value, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Rules:
    """The first rule that fits decides; where none does, the answer is no."""

    rules: tuple[Rule, ...] = field(default=())

    @hookimpl
    async def access_review(self, request: AccessRequest) -> str | None:
        about = "" if request.name is None else f" of domain {request.name}"
        for number, rule in enumerate(self.rules, 1):
            if rule.fits(request):
                if rule.allow:
                    return None
                return f"rule {number} forbids {request.client.identity} {request.action}{about}"
        return f"no rule allows {request.client.identity} {request.action}{about}"


def read_rules(text: str) -> Rules:
    """Read a file of rules.

    :raises RulesError: it is no TOML, or has anything but rules; what is wrong and where.
    """
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RulesError(f"the rules are no TOML: {error}") from error
    given = found.pop("rule", [])
    if found:
        raise RulesError(f"the rules have {min(found)!r:.60}: there are only [[rule]] tables")
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise RulesError("rule must be a list of tables: write [[rule]]")
    return Rules(tuple(_rule(number, each) for number, each in enumerate(given, 1)))


def _rule(number: int, given: dict[str, Any]) -> Rule:
    patterns: dict[str, tuple[str, ...]] = {}
    allow = given.get("allow")
    if not isinstance(allow, bool):
        raise RulesError(f"rule {number} must say allow = true or allow = false")
    for key, value in given.items():
        if key == "allow":
            continue
        if key not in ("who", "actions", "domains", "hosts"):
            raise RulesError(
                f"rule {number} has {key!r:.60}: there are allow, who, actions, domains and hosts"
            )
        if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
            raise RulesError(f"{key} of rule {number} must be a list of patterns, not {value!r:.80}")
        patterns[key] = tuple(value)
    return Rule(allow, **patterns)
