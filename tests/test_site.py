"""The site builds, strictly, without a network."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytest.importorskip("sphinx", reason="the docs extra is not installed")

SCRIPT = '''"""# A title

About it.
"""

import sys

# %%
# ## A heading
#
# Text with `code`.

print(1)


# %%
# The end.
'''


@pytest.fixture
def site_pages(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("site_pages")


def test_a_script_becomes_a_page_of_text_and_code_by_turns(site_pages):
    page = site_pages.as_page(SCRIPT, "script.py", "1\n")
    assert page.startswith("# A title\n\nAbout it.\n\n```python\nimport sys\n```\n\n## A heading\n\nText with `code`.\n")
    assert "```python\nprint(1)\n```\n\nThe end.\n\n## What it prints\n\n```text\n1\n```\n" in page


def test_any_other_script_is_its_code(site_pages):
    assert site_pages.as_page("x = 1\n", "x.py") == "---\norphan: true\n---\n# x.py\n\n```python\nx = 1\n```\n"


def test_the_front_pages_lists_are_the_navigation(site_pages):
    front = "# Front\n\n## Guide\n\n- [One](one.md): first\n- [Two](../two.py)\n\n## Elsewhere\n\n- [x](https://x.org/a.md)\n"
    assert site_pages.navigation(front) == "```{toctree}\n:hidden:\n:caption: Guide\n\none\n../two\n```"


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-d", str(tmp_path / "trees"), "."]
    built = subprocess.run([*command, str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "site" / "docs" / "api" / "callbacks.html").read_text(encoding="utf-8")
    assert 'id="lightning_gradnorm.GradNormCallback"' in reference
    assert "*args" not in reference, "a signature has every argument"
    pages = list((tmp_path / "site").rglob("*.html"))
    outside = [page.name for page in pages if 'rel="stylesheet" type="text/css" href="http' in page.read_text(encoding="utf-8")]
    assert len(pages) > 40
    assert outside == []
