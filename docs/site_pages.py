"""What the site adds to Sphinx: the navigation from the front page's own lists, and scripts that are pages.

A tutorial's ``# %%`` lines part it into pieces; a piece that begins with comments has them as its text, in Markdown, and the
rest as its code. What it printed when last run lies beside it, ``<name>.txt``, and is the page's end. Of any other script
the page is its code.
"""

import inspect
import re
from pathlib import Path

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature

PIECE = re.compile(r"^# %%.*\n", re.MULTILINE)
ITEM = re.compile(r"^- \[.*?\]\(([^)#:]+)\.(?:md|py)\)", re.MULTILINE)


def as_page(script: str, name: str, printed: str = "") -> str:
    """Markdown of a script: its docstring, then text and code by turns, then what it printed."""
    about, *pieces = PIECE.split(script)
    if not pieces:
        return f"---\norphan: true\n---\n# {name}\n\n```python\n{script}```\n"
    docstring, code = re.fullmatch(r'"""(.*?)"""\n+(.*)', about, flags=re.DOTALL).groups()
    parts = [docstring.strip(), f"```python\n{code.strip()}\n```"]
    for piece in pieces:
        lines = piece.splitlines()
        told = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
        parts.append("\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:told]))
        if code := "\n".join(lines[told:]).strip("\n"):
            parts.append(f"```python\n{code}\n```")
    return "\n\n".join([*parts, f"## What it prints\n\n```text\n{printed.rstrip()}\n```\n"])


class ScriptParser(MystParser):
    """Reads a script as the page that it is."""

    supported = ("script",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Parse the page into the document."""
        script = Path(document["source"])
        printed = script.with_suffix(".txt")
        text = printed.read_text(encoding="utf-8") if printed.exists() else ""
        super().parse(as_page(inputstring, script.name, text), document)


def navigation(page: str) -> str:
    """A hidden ``toctree`` for each list of links under a heading of the front page."""
    trees = []
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        if pages := ITEM.findall(text):
            trees.append("\n".join(["```{toctree}", ":hidden:", f":caption: {heading}", "", *pages, "```"]))
    return "\n\n".join(trees)


def add_navigation(app: Sphinx, page: str, source: list[str]) -> None:
    """The front page and its navigation."""
    if page == app.config.root_doc:
        source[0] += "\n" + navigation(source[0])


def skip_fields(app: Sphinx, what: str, name: str, member: object, skip: bool, options: object) -> bool | None:
    """Fields of tuples and dataclasses are told of once, where their class is."""
    is_field = type(member).__name__ == "_tuplegetter" or getattr(member, "__name__", name) != name
    return True if is_field else None


def signature_of_class(app: Sphinx, what: str, name: str, taken: object, *rest: object) -> tuple[str, str] | None:
    """What a class is called with, where a base's ``__new__`` takes anything."""
    if what != "class":
        return None
    return stringify_signature(inspect.signature(taken), show_return_annotation=False, unqualified_typehints=True), ""


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_source_suffix(".py", "script")
    app.add_source_parser(ScriptParser)
    app.connect("source-read", add_navigation)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-signature", signature_of_class)
    return {"parallel_read_safe": True}
