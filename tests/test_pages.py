"""Every page: its links, anchors and pictures lead somewhere, and its Python says where its names come from."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/**/*.md"),
        *ROOT.glob("docs/tutorials/*.py"),
    ]
)
FENCED = re.compile(r"^```(\w*).*?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def text_of(page: Path) -> str:
    """What is no code."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^# ?", "", text, flags=re.MULTILINE) if page.suffix == ".py" else FENCED.sub("", text)


def anchors(page: Path) -> set[str]:
    """Those that a code host and the site make of the page's headings."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def broken(page: Path) -> list[str]:
    """The links that lead nowhere; those to other hosts are not followed."""
    found = []
    for link in LINK.findall(text_of(page)):
        target, _, anchor = link.partition("#")
        there = (page.parent / target).resolve() if target else page
        if not re.match(r"https?://", link) and not (there.is_file() and (not anchor or anchor in anchors(there))):
            found.append(link)
    return found


@every_page
def test_links_anchors_and_pictures_lead_somewhere(page):
    assert broken(page) == []


def test_what_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One: *two*\n[a](#one-two) [b](#three) [c](none.md) ![d](page.md) [e](https://x.org/y)\n```\n[f](g)\n```\n"
    )
    assert broken(page) == ["#three", "none.md"]


def test_pages_say_where_the_names_in_their_python_come_from(tmp_path):
    for page in PAGES:
        blocks = [code for language, code in FENCED.findall(page.read_text(encoding="utf-8")) if language == "python"]
        if blocks and page.suffix == ".md":
            (tmp_path / f"{name_of(page).replace('/', ' ')}.py").write_text("\n".join(blocks), encoding="utf-8")
    assert len(list(tmp_path.glob("*.py"))) > 5
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--no-cache",
        "--select",
        "E9,F821",
        "--output-format",
        "concise",
    ]
    checked = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
