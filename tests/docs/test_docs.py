"""The documentation says what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import pytest

import ferryman.sync
from ferryman import errors
from ferryman.hookspecs import DriverHooks, ObserverHooks, hook_names
from ferryman.types import MigrationOptions
from ferryman_qemu.machine import IGNORED
from tests.qemu import laid_out

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- needs-qemu -->\n)?```python\n(.*?)```", re.DOTALL)
SNIPPETS = [
    pytest.param(code, bool(needs), id=f"{page.name}-{number}")
    for page in PAGES
    for number, (needs, code) in enumerate(BLOCK.findall(page.read_text()))
]


@pytest.mark.parametrize(("code", "needs_qemu"), SNIPPETS)
def test_every_snippet_runs(code: str, needs_qemu: bool) -> None:
    with ExitStack() as stack:
        if needs_qemu:
            field = stack.enter_context(laid_out())
            with ferryman.sync.connect(field.uris[0]) as a:
                a.create(field.define("web"))
            for root, uri in zip(("/srv/a", "/srv/b"), field.uris, strict=True):
                assert code.count(f"qemu:///embed?root={root}") == 1
                code = code.replace(f"qemu:///embed?root={root}", uri)
            stack.callback(end_guest, field.uris[1], "web")
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


def end_guest(uri: str, name: str) -> None:
    """End a guest where it must be now."""
    with ferryman.sync.connect(uri) as host:
        host.lookup_by_name(name).destroy()


def leaves(root: type[errors.FerrymanError]) -> set[str]:
    below = root.__subclasses__()
    return set().union(*(leaves(one) for one in below)) | ({root.code} if "code" in vars(root) else set())


def test_every_error_has_a_page_and_every_page_an_error() -> None:
    pages = {path.stem for path in (ROOT / "docs" / "errors").glob("*.md")} - {"index"}
    assert pages == leaves(errors.FerrymanError) - {"error"}
    for code in pages:
        assert code in (errors.__doc__ or "")


def test_every_hook_is_documented() -> None:
    for hooks in (DriverHooks, ObserverHooks):
        for name in hook_names(hooks):
            assert len(getattr(hooks, name).__doc__ or "") > 40, name


def test_every_option_stands_in_the_table() -> None:
    page = (ROOT / "docs/use/migrating.md").read_text()
    for option in fields(MigrationOptions):
        assert f"| `{option.name}` |" in page


def test_every_finding_stands_in_the_list() -> None:
    page = (ROOT / "docs/reference/findings.md").read_text()
    found: set[str] = set()
    for path in [*(ROOT / "core/src").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        text = path.read_text()
        found |= set(re.findall(r"_blocker\(\s*\"([a-z-]+)\"", text))
        found |= set(re.findall(r"\bcode=\"([a-z-]+)\"", text))
    assert len(found) > 15
    assert {code for code in found if f"| `{code}` |" not in page} == set()


def test_every_element_without_effect_stands_in_the_list() -> None:
    page = (ROOT / "docs/use/qemu-definitions.md").read_text()
    listed = page.partition("## Accepted without effect")[2].partition("## ")[0]
    assert dict(re.findall(r"^\| `(.+?)` \| (.+) \|$", listed, re.MULTILINE)) == IGNORED
