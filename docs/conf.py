"""Configuration of Sphinx: `make docs` builds with every warning an error and every reference checked."""

import logging
from importlib.metadata import version as distribution_version
from pathlib import Path

from ferryman.handover import SOURCE_STATES, TABLE, Record
from ferryman.types import Side

project = "Ferryman"
author = "The Ferryman authors"
project_copyright = "The Ferryman authors"
release = version = distribution_version("ferryman")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.graphviz"]
exclude_patterns = ["_build", "reference/_table.rst"]
graphviz_output_format = "svg"
html_theme = "furo"
html_title = "Ferryman"
html_copy_source = False

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

# A pattern of the toctree may match nothing; Sphinx gives this warning no name that suppress_warnings could take.
logging.getLogger("sphinx.sphinx.directives.other").addFilter(
    lambda record: getattr(record, "subtype", None) != "empty_glob"
)
# References into other projects would need their inventories from the network: only our own names are checked.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!ferryman).*"),
    (r"py:class", r"ferryman\.(registry\.Hooks|engine\.Host(End)?)"),
]
# The blocking face has the same names as the asynchronous one.
suppress_warnings = ["ref.python"]


def _write_table() -> None:
    """Write the transition table as a page's part, so that it is always the one that runs."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    rows = [("state", "input", "record written first", "then", "answer", "state after")]
    for (state, given), step in TABLE.items():
        actions = ", ".join(action.value for action in step.actions)
        rows.append(
            (
                state.value,
                given.value,
                step.record.value if step.record else "-",
                actions or "-",
                step.answer.value if step.answer else "-",
                step.state.value,
            )
        )
    for row in rows:
        lines += [f"   {'* -' if number == 0 else '  -'} {cell}" for number, cell in enumerate(row)]
    text = "\n".join(lines) + "\n"
    path = Path(__file__).parent / "reference" / "_table.rst"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _write_diagram(side: Side) -> None:
    """Draw one side's states: written ones in bold; what only repeats an answer is left out."""
    durable = {record.value for record in Record}
    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, given), step in TABLE.items():
        says_only = step.record is None and not step.actions and step.state is state
        if (step.state in SOURCE_STATES) is (side is Side.SOURCE) and not says_only:
            also = f" / {', '.join(action.value for action in step.actions)}" if step.actions else ""
            arrows.setdefault((state.value, step.state.value), []).append(given.value + also)
    lines = ["digraph {", '  rankdir="TB"; node [shape=box, style=rounded, fontname="sans-serif"];']
    lines.append('  edge [fontname="sans-serif", fontsize=9];')
    for state in sorted({state for arrow in arrows for state in arrow}):
        lines.append(f'  "{state}" [style="rounded,{"bold" if state in durable else "dashed"}"];')
    for (start, end), labels in arrows.items():
        label = "\\n".join(labels)
        lines.append(f'  "{start}" -> "{end}" [label="{label}"];')
    path = Path(__file__).parent / "why" / f"_{side.value}.dot"
    text = "\n".join([*lines, "}"]) + "\n"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


_write_table()
_write_diagram(Side.SOURCE)
_write_diagram(Side.DESTINATION)
