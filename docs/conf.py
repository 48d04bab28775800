"""Configuration of Sphinx: `make docs` builds with every warning an error and every reference checked."""

import logging
from importlib.metadata import version as distribution_version

project = "Ferryman"
author = "The Ferryman authors"
project_copyright = "The Ferryman authors"
release = version = distribution_version("ferryman")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
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
nitpick_ignore_regex = [(r"py:.*", r"(?!ferryman).*")]
