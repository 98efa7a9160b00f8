"""Writes docs/trainer-features.md from the tests' own ``pytest.mark.feature(name, verdict, note)``.

python docs/make_features.py           writes the page
python docs/make_features.py --check   exits with 1 if the page is not what the tests say
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "trainer-features.md"
HEAD = """# Trainer features

Each row is a test against an oracle: a loop written by hand, or the same run without the feature. This page is written by
`python docs/make_features.py` from the tests themselves.

| feature | | what is right | test |
|---|---|---|---|
"""
TAIL = """
Known limits, not ours: under DDP, `static_graph=True` together with accumulation fails in torch itself, with or without this
package. Lightning divides every loss by `accumulate_grad_batches`, also in a last, shorter window.
"""


def rows() -> list[tuple[str, ...]]:
    """(feature, verdict, note, test) of every marked test, in the order of files and lines."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.feature":
                        name, verdict, *note = (ast.literal_eval(argument) for argument in mark.args)
                        found.append((name, verdict, note[0] if note else "", f"`{path.stem}::{node.name}`"))
    return found


def page() -> str:
    """The whole page."""
    return HEAD + "".join("| " + " | ".join(row) + " |\n" for row in rows()) + TAIL


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
