"""Settings of the documentation site: python -m sphinx -W --keep-going -c docs . docs/_build

The site is built from the repository's root. So a link between two pages is the same on GitHub and in the site.
"""

import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer

import timm_autoslim
from timm_autoslim.utils.tables import Table

project = "timm-autoslim"
author = "the timm-autoslim authors"
version = release = timm_autoslim.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**.md"]
exclude_patterns = [".*", "docs/_build", "build", "dist", "recipes", "runs", "tests", "timm_autoslim"]
nitpicky = True
# Types of other projects, which would have to be read from the network, and types that are not public.
nitpick_ignore_regex = [("py:.*", r"(?!timm_autoslim\.).*"), ("py:.*", r"timm_autoslim\.\w+\.\w+\.\w+")]

myst_heading_anchors = 4
myst_disable_syntax = ["myst_line_comment"]  # a line that starts with % is text, as on GitHub

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
default_role = "code"  # docstrings have code in single backticks, as Markdown does
napoleon_use_ivar = True
maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"timm-autoslim {release}"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
pygments_dark_style = "github-dark"

CONTENTS = """
```{toctree}
:hidden:
:caption: Start

Quickstart <docs/quickstart>
Tutorial <docs/tutorial>
Concepts and glossary <docs/concepts>
```

```{toctree}
:hidden:
:caption: How to

Slim with one command <docs/howto/slim>
Slim without training <docs/howto/reconstruct>
Set budgets <docs/howto/budgets>
Choose a budget for a device <docs/howto/devices>
Freeze layers and limit widths <docs/howto/freezing>
Slim transformers <docs/howto/transformers>
Slim backbones and own models <docs/howto/backbones>
Slim a YOLO <docs/howto/yolo>
Use slim models in other packages <docs/howto/packages>
Deploy <docs/howto/deploy>
Use several GPUs <docs/howto/multi-gpu>
Resume <docs/howto/resume>
Add an operator rule <docs/operators>
```

```{toctree}
:hidden:
:caption: Look up

docs/training
docs/costs
docs/limits
docs/coverage
docs/ecosystem
docs/benchmarks
docs/api
```

```{toctree}
:hidden:
:caption: The project

Changes <CHANGELOG>
CONTRIBUTING
SECURITY
```
"""


def add_contents(app: Sphinx, name: str, source: list[str]) -> None:
    """Append the table of contents to the front page. GitHub shows README.md without it."""
    if name == root_doc:
        source[0] += CONTENTS


def find_public(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element) -> nodes.Element | None:
    """Link a type of an annotation, or an error of a docstring, to the public name that the reference describes."""
    name = node.get("reftarget", "").rpartition(".")[2]
    module = "timm_autoslim" if name in timm_autoslim.__all__ else "timm_autoslim.errors"
    if node.get("refdomain") != "py":
        return None
    python = env.get_domain("py")
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", f"{module}.{name}", node, text)


def hide_constructor(app: Sphinx, what: str, name: str, value: Any, *signature: object) -> tuple[str, str] | None:
    """Show no arguments of classes that users do not construct: those whose docstring has no `Args`."""
    return ("", "") if what == "class" and "Args:" not in (value.__doc__ or "") else None


def describe_table(app: Sphinx, what: str, name: str, value: Any, options: object, lines: list[str]) -> None:
    """Describe a table of choices by the text below it, and list its keys."""
    if isinstance(value, Table):
        name = name.rpartition(".")[2]
        module = ModuleAnalyzer.for_module(f"timm_autoslim.{timm_autoslim._MODULES[name]}")
        choices = ", ".join(f"`{choice}`" for choice in value)
        lines[:] = [*module.find_attr_docs().get(("", name), []), "", f"Choices: {choices}."]


def add_index(app: Sphinx, error: Exception | None) -> None:
    """Let the site's address show the front page."""
    front = Path(app.outdir, f"{root_doc}.html")
    if error is None and front.is_file():
        shutil.copyfile(front, front.with_name("index.html"))


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.connect("source-read", add_contents)
    app.connect("missing-reference", find_public)
    app.connect("autodoc-process-signature", hide_constructor)
    app.connect("autodoc-process-docstring", describe_table)
    app.connect("build-finished", add_index)
